"""The SFU's side: its keys and tokens, its webhooks, and the questions that it can be asked."""
