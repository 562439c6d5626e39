"""Fine-tuning of all weights of a network on labelled images, as iBOT publishes it."""
