"""Plans that one selection does not find: in steps where channels go, by the clock, by the size of a file."""
