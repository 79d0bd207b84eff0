"""What operators ask a running daemon from the command line, over its admin listener. It must never show a secret."""
