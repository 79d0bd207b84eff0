"""Looking: all that opens, asks or waits. Nothing here may change what a running daemon works with."""
