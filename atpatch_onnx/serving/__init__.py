"""Serving a patched model: sessions that swap patches, a protocol, and a server of replicas."""
