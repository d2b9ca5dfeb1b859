"""Code for processors other than the host: GPUs and microcontrollers. No vertical has any yet."""
