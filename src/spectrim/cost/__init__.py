"""What layers and networks cost: counted, and measured by the clock."""
