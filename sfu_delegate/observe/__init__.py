"""What operators see of the daemon: log lines and metrics. Nothing here decides anything, and a secret must never pass through."""
