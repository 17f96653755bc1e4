"""Everything that touches ``torch.nn``: finding layers, watching them, building and replacing modules."""
