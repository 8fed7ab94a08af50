"""The seam to the operating system: what can answer EPERM stands here; each kernel or systemd package has one importer."""
