"""Process groups, collectives, the device, and the CPU stand-in of Megatron."""
