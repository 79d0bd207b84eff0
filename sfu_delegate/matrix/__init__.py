"""The homeserver side: which homeservers are served, where they are, and the management of delayed events (MSC4140) at them.

Nothing here decides what is to be done with a delayed event, and nothing here lets a client decide where requests go.
"""
