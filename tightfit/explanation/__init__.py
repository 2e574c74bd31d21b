"""Why a training step needs the memory it needs, and what would help: of a model, or of an unchanged script."""
