"""What a training consists of besides its data: model state, optimizer state, loss scale."""
