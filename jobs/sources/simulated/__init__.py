"""A small shop with clicks, carts and purchases whose true probabilities are known.

``truth.py`` says what shoppers want, ``world.py`` lets them shop day by day, and
``write.py`` writes the raw log in the input contract of ``docs/input.md``.
``schema.toml`` is the feature schema of that log.
"""
