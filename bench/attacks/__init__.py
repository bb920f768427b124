"""Attacks by clients and by other users of the machine on a running server, seen by a client that does nothing wrong."""
