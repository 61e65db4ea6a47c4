"""Fine-tuning: a labelled folder in, a network whose embedding retrieves better out."""
