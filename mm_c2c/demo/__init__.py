"""The page that `mm-c2c demo` shows: what it does in plain functions, its layout in `page.py`."""
