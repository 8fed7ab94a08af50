"""Packets of interfaces, for the same elements: a tap only sees them, an inline link judges them."""
