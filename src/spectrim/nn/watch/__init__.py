"""Running a network and looking at what passes: statistics, gradients, responses."""
