"""Units, and the generator, which systemd runs as a program of its own; Python reads neither."""
