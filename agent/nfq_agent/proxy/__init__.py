"""The transparent TCP proxy."""
