"""nf_tables over netlink: this instance's rules in a table of its own."""
