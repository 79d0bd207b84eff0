"""asyncio: the inbox before the engine, the carrying out of its actions, and the start and stop of everything."""
