"""Code for processors other than the host: GPUs and microcontrollers."""
