"""The seam to the operating system: whatever can answer EPERM stands here, and each kernel or systemd package has one importer."""
