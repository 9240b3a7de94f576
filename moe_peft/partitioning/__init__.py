"""Where arrays live: the device mesh and the sharding of batches."""
