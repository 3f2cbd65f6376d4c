//! The collaborative models, one file each.
