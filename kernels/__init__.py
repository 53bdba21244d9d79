"""Numbers in, numbers out: the operations a device must supply, and the devices that do."""
