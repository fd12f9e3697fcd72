"""Devices, hosts and collectives: the only place that names pmap, shard_map or a mesh."""
