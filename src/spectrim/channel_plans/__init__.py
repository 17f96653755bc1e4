"""How many channels go: under a budget, and by the spectrum alone."""
