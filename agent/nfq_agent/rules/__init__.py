"""Netfilter rules as values: what a configuration asks for, and how that differs from what the kernel has."""
