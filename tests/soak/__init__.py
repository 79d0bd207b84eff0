"""A soak: the real daemon as a process, the sandbox around it, thousands of people, and everything that can go wrong, for as long as asked."""
