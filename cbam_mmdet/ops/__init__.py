"""How CBAM is computed: six passes over memory, on CPUs and in Triton, and the choice between them."""
