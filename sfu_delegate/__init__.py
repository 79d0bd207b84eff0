"""sfu-delegate: manages the delayed "I left" events of Matrix calls on behalf of clients, by what the SFU sees."""

__version__ = "0.1.0"
