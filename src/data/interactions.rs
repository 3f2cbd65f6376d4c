//! The common form of every raw source: interactions of users with items, in file order, and what was wrong with the rest.
//!
//! A row that cannot be used is noted with file, line, reason and text. By default any such row refuses the whole input:
//! silently thinner data gives silently different numbers. What the rows become is left to `rules`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;

use super::Error;
use super::error::BadRow;
use super::samples::Split;

/// One interaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interaction {
    /// Index into [`Interactions::users`].
    pub user: u32,
    /// Index into [`Interactions::items`].
    pub item: u32,
    /// Liked?
    pub label: bool,
    /// Unix seconds.
    pub timestamp: i64,
    /// Train, valid or test; `None` leaves the row out.
    pub split: Option<Split>,
}

/// A source in the common form.
#[derive(Clone, Debug, Default)]
pub struct Interactions {
    /// Raw user keys.
    pub users: Vec<String>,
    /// Raw item keys.
    pub items: Vec<String>,
    /// Title of each item.
    pub titles: Vec<String>,
    /// Rows in file order.
    pub rows: Vec<Interaction>,
    /// Good rows that were left out before: of items that the items file does not name, of other years.
    pub unused: usize,
}

/// What to do with an interaction whose item the items file does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownItem {
    /// It is an unusable row.
    Refuse,
    /// It is left out and counted, as an inner join does.
    Drop,
}

/// Collects interactions and what is wrong with them.
#[derive(Debug, Default)]
pub struct Collector {
    /// The common form so far.
    pub interactions: Interactions,
    /// Unusable rows so far.
    pub bad: Vec<BadRow>,
    users: HashMap<String, u32>,
    items: HashMap<String, u32>,
    first_lines: HashMap<(u32, u32), u64>,
}

impl Collector {
    /// Notes an unusable row.
    pub fn reject(&mut self, path: &Path, line: u64, reason: String, text: &str) {
        self.bad.push(BadRow { path: path.to_path_buf(), line, reason, text: text.chars().take(200).collect() });
    }

    /// Adds an item. `Err`: why the row is unusable.
    pub fn item(&mut self, key: &str, title: &str) -> Result<(), String> {
        if key.is_empty() {
            return Err("the item is empty; expected its id".into());
        }
        if title.is_empty() {
            return Err(format!("item {key} has an empty title; expected its text"));
        }
        let next = self.items.len() as u32;
        match self.items.entry(key.to_string()) {
            Entry::Occupied(e) => {
                let first = &self.interactions.titles[*e.get() as usize];
                if first != title {
                    return Err(format!(
                        "item {key} is titled {title:?} here and {first:?} before; expected one title"
                    ));
                }
            }
            Entry::Vacant(e) => {
                e.insert(next);
                self.interactions.items.push(key.to_string());
                self.interactions.titles.push(title.to_string());
            }
        }
        Ok(())
    }

    /// Adds an interaction found in `line`; its split is assigned later. `Err`: why the row is unusable.
    pub fn interaction(
        &mut self,
        line: u64,
        (user, item): (&str, &str),
        label: bool,
        timestamp: i64,
        unknown: UnknownItem,
    ) -> Result<(), String> {
        if user.is_empty() || item.is_empty() {
            return Err(format!("expected a user and an item, found {user:?} and {item:?}"));
        }
        let Some(&item_index) = self.items.get(item) else {
            if unknown == UnknownItem::Refuse {
                return Err(format!("item {item:?} is not in the items file"));
            }
            self.interactions.unused += 1;
            return Ok(());
        };
        let user_index = match self.users.get(user) {
            Some(&index) => index,
            None => {
                let index = self.interactions.users.len() as u32;
                self.interactions.users.push(user.to_string());
                self.users.insert(user.to_string(), index);
                index
            }
        };
        match self.first_lines.entry((user_index, item_index)) {
            Entry::Occupied(first) => {
                let first = first.get();
                return Err(format!(
                    "user {user} and item {item} are already in line {first}; expected one row a pair"
                ));
            }
            Entry::Vacant(slot) => slot.insert(line),
        };
        self.interactions.rows.push(Interaction { user: user_index, item: item_index, label, timestamp, split: None });
        Ok(())
    }

    /// The interactions, or an error that names the unusable rows.
    pub fn finish(self, skip_bad_rows: bool) -> Result<(Interactions, Vec<BadRow>), Error> {
        if self.bad.is_empty() || skip_bad_rows {
            Ok((self.interactions, self.bad))
        } else {
            Err(Error::BadRows(self.bad))
        }
    }
}
