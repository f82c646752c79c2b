"""What the experiment is made of: metrics, SyncNet, the compared systems, figures, the listening test."""
