"""Methods of other papers that the tables compare with and that need no diffusion model."""
