"""From a table of candidates and a budget to a plan."""
