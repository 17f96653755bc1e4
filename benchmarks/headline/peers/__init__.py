"""Other ways to compress without training, each written from its description or run from its package."""
