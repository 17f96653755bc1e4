"""A network as numbers: layers, sites, choices, factors and coupled channels, without a module."""
