"""What it is installed with: the systemd unit, the container image, the compose file and the shells' completions."""
