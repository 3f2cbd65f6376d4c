//! `collm-engine prepare`: raw interactions become train/valid/valid_small/test Parquet splits.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Subcommand;

use crate::data::{
    Layout, Liked, Manifest, Split, SplitRule, Window, prepare_amazon, prepare_collm, prepare_ml1m,
    prepare_ml100k_from, prepare_table,
};

/// Arguments of `collm-engine prepare`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    source: Source,
}

#[derive(Subcommand)]
enum Source {
    /// Raw MovieLens-1M (`ratings.dat`, `movies.dat`) by the official CoLLM rules.
    #[command(name = "ml-1m")]
    Ml1m {
        /// Directory that holds the two files.
        #[arg(long, value_name = "DIR")]
        from: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// MovieLens-100K as RecBole ships it (`ml-100k.inter`, `ml-100k.item`), split by time 60/20/20.
    #[command(name = "ml-100k")]
    Ml100k {
        /// Directory that holds the two files, or the wheel recbole-*.whl that they come in.
        #[arg(long, value_name = "PATH")]
        from: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// RecBole atomic files.
    Recbole {
        /// Interactions (`.inter`).
        #[arg(long, value_name = "FILE")]
        inter: PathBuf,
        /// Items (`.item`).
        #[arg(long, value_name = "FILE")]
        item: PathBuf,
        /// Column of the title (default: the one that is named like a title).
        #[arg(long, value_name = "NAME")]
        title_column: Option<String>,
        /// Column of a 0/1 label, instead of the rating and its threshold.
        #[arg(long, value_name = "NAME", conflicts_with = "threshold")]
        label_column: Option<String>,
        #[command(flatten)]
        split: Splits,
        #[command(flatten)]
        output: Output,
    },
    /// CSV files: interactions (user, item, rating, timestamp) and items (item, title).
    Csv {
        /// Field delimiter.
        #[arg(long, default_value = ",", value_name = "CHAR")]
        delimiter: String,
        #[command(flatten)]
        table: Table,
    },
    /// The same from Parquet: files, or directories of part files (with key=value directories as columns) as Spark writes them.
    Parquet {
        #[command(flatten)]
        table: Table,
    },
    /// Amazon Books by the official CoLLM rules, from the dump of 2018 (JSON) or 2023 (JSONL, Parquet).
    AmazonBook(Amazon),
    /// Amazon Video Games by the same rules.
    AmazonVideoGames(Amazon),
    /// Amazon CDs and Vinyl by the same rules.
    #[command(name = "amazon-cds")]
    AmazonCds(Amazon),
    /// The official CoLLM files: a zip or directory of `*_ood2.pkl`, or a directory of the same as Parquet.
    Collm {
        /// The zip or directory.
        #[arg(long, value_name = "PATH")]
        from: PathBuf,
        /// Directory to write.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(clap::Args)]
struct Table {
    /// Interactions (CSV or Parquet).
    #[arg(long, value_name = "PATH")]
    interactions: PathBuf,
    /// Items (CSV or Parquet).
    #[arg(long, value_name = "PATH")]
    items: PathBuf,
    /// Column of the user.
    #[arg(long, default_value = "user", value_name = "NAME")]
    user_column: String,
    /// Column of the item, in both files.
    #[arg(long, default_value = "item", value_name = "NAME")]
    item_column: String,
    /// Column of the rating.
    #[arg(long, default_value = "rating", value_name = "NAME")]
    rating_column: String,
    /// Column of a 0/1 label, instead of the rating and its threshold.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["threshold", "rating_column"])]
    label_column: Option<String>,
    /// Column of the time: Unix seconds, ISO dates (UTC), or Parquet's own times and dates.
    #[arg(long, default_value = "timestamp", value_name = "NAME")]
    time_column: String,
    /// Column of the title.
    #[arg(long, default_value = "title", value_name = "NAME")]
    title_column: String,
    #[command(flatten)]
    split: Splits,
    #[command(flatten)]
    output: Output,
}

impl Table {
    /// Prepares the pair of tables; the output directory comes along.
    fn prepare(self, name: &str, delimiter: u8) -> Result<(Manifest, PathBuf)> {
        let layout = Layout {
            delimiter,
            quoting: true,
            typed_header: false,
            user: self.user_column,
            item: self.item_column,
            liked: self.split.liked(self.rating_column, self.label_column),
            timestamp: self.time_column,
            title: Some(self.title_column),
            year: None,
        };
        let Output { out, skip_bad_rows } = self.output;
        let split = self.split.rule()?;
        Ok((prepare_table(name, &self.interactions, &self.items, &layout, &split, &out, skip_bad_rows)?, out))
    }
}

#[derive(clap::Args)]
struct Amazon {
    /// Reviews: Books_5.json.gz (2018), Books.jsonl.gz (2023), unpacked or not, or a Parquet file or directory.
    #[arg(long, value_name = "PATH")]
    reviews: PathBuf,
    /// Items with their titles: meta_Books.json.gz, meta_Books.jsonl.gz, or Parquet.
    #[arg(long, value_name = "PATH")]
    meta: PathBuf,
    /// Year whose reviews are taken: January to November to train, December to judge.
    #[arg(long, default_value_t = Window::default().year, value_name = "YEAR")]
    year: u16,
    /// Users and items need more than this many reviews in that year.
    #[arg(long, default_value_t = Window::default().more_than, value_name = "N")]
    more_than: u32,
    #[command(flatten)]
    output: Output,
}

impl Amazon {
    fn prepare(self, name: &str) -> Result<(Manifest, PathBuf)> {
        let Output { out, skip_bad_rows } = self.output;
        let window = Window { year: self.year, more_than: self.more_than };
        Ok((prepare_amazon(name, (&self.reviews, &self.meta), window, &out, skip_bad_rows)?, out))
    }
}

#[derive(clap::Args)]
struct Output {
    /// Directory to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Leave unusable rows out and list them in bad_rows.tsv, instead of refusing the input.
    #[arg(long)]
    skip_bad_rows: bool,
}

#[derive(clap::Args)]
struct Splits {
    /// A rating of at least this is a like.
    #[arg(long, default_value_t = 4.0, value_name = "RATING")]
    threshold: f64,
    /// Train, valid and test, in percent of the rows in order of time.
    #[arg(long, default_value = "60/20/20", value_name = "T/V/T", conflicts_with_all = ["valid_from", "test_from"])]
    split: String,
    /// First date of valid (instead of --split).
    #[arg(long, value_name = "DATE", requires = "test_from")]
    valid_from: Option<String>,
    /// First date of test.
    #[arg(long, value_name = "DATE", requires = "valid_from")]
    test_from: Option<String>,
}

impl Splits {
    fn rule(&self) -> Result<SplitRule> {
        Ok(match (&self.valid_from, &self.test_from) {
            (Some(valid), Some(test)) => SplitRule::parse_dates(valid, test)?,
            _ => SplitRule::parse_fractions(&self.split)?,
        })
    }

    fn liked(&self, rating: String, label: Option<String>) -> Liked {
        match label {
            Some(column) => Liked::Label { column },
            None => Liked::Rating { column: rating, threshold: self.threshold },
        }
    }
}

/// Runs the subcommand.
pub fn run(args: Args) -> Result<ExitCode> {
    let start = Instant::now();
    let (manifest, out) = match args.source {
        Source::Ml1m { from, output: o } => {
            (prepare_ml1m(&from.join("ratings.dat"), &from.join("movies.dat"), &o.out, o.skip_bad_rows)?, o.out)
        }
        Source::Ml100k { from, output: o } => (prepare_ml100k_from(&from, &o.out, o.skip_bad_rows)?, o.out),
        Source::Recbole { inter, item, title_column, label_column, split, output: o } => {
            let liked = split.liked("rating".into(), label_column);
            let layout = Layout { title: title_column, liked, ..Layout::recbole(split.threshold) };
            let name = "RecBole atomic files";
            (prepare_table(name, &inter, &item, &layout, &split.rule()?, &o.out, o.skip_bad_rows)?, o.out)
        }
        Source::Csv { delimiter, table } => {
            let delimiter = match delimiter.as_bytes() {
                b"\\t" | b"tab" => b'\t',
                &[byte] if byte.is_ascii() => byte,
                _ => bail!("--delimiter {delimiter:?}: expected one ASCII character, or tab"),
            };
            table.prepare("CSV", delimiter)?
        }
        Source::Parquet { table } => table.prepare("Parquet", b',')?,
        Source::AmazonBook(amazon) => amazon.prepare("Amazon Books")?,
        Source::AmazonVideoGames(amazon) => amazon.prepare("Amazon Video Games")?,
        Source::AmazonCds(amazon) => amazon.prepare("Amazon CDs and Vinyl")?,
        Source::Collm { from, out } => (prepare_collm(&from, &out)?, out),
    };
    println!("{}", summary(&manifest));
    println!("{} in {:.1} s", out.display(), start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

/// The counts as a table.
pub fn summary(manifest: &Manifest) -> String {
    let mut text = format!(
        "{}: {} users, {} items\n{:<12} {:>9} {:>8} {:>7} {:>7} {:>9} {:>9} {:>9}\n",
        manifest.source,
        manifest.n_users - 1,
        manifest.n_items - 1,
        "split",
        "rows",
        "liked",
        "users",
        "items",
        "not cold",
        "warm",
        "both new"
    );
    for split in Split::ALL {
        let f = manifest.splits.of(split);
        text += &format!(
            "{:<12} {:>9} {:>7.2}% {:>7} {:>7} {:>9} {:>9} {:>9}\n",
            split.name(),
            f.rows,
            100.0 * f.positive_rate,
            f.users,
            f.items,
            f.not_cold,
            f.warm,
            f.both_new
        );
    }
    if manifest.unused_rows > 0 {
        text += &format!("{} rows not used by the rules\n", manifest.unused_rows);
    }
    if manifest.bad_rows > 0 {
        text += &format!("{} unusable rows left out, listed in bad_rows.tsv\n", manifest.bad_rows);
    }
    text.trim_end().to_string()
}
