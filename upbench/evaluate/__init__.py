"""The engines that tasks are made of, and the protocol that they keep."""
