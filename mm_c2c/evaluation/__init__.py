"""What a bridge is worth: items, arms, controls, and a run that compares them."""
