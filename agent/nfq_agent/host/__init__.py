"""The seam to the operating system: calls that can answer EPERM are here; each kernel or systemd package has one importer."""
