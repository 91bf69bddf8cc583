"""Asking people: what is routed to them, what becomes of their answers, and when the machine's own labels will do."""
