"""Processing in SRAM."""
