"""Solvers of others, under one signature; each module says where its solver comes from."""
