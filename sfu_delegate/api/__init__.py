"""HTTP: the delegation API, the webhooks, health and metrics. It checks what comes in, hands it to the inbox, and words what comes out."""
