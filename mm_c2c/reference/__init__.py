"""The pair that ships with the library: sticker scenes, the small VLM, SmolLM2 as the target."""

__all__: list[str] = []
