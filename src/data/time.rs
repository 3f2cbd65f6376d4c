//! Timestamps: Unix seconds from text, and the calendar (proleptic Gregorian, UTC) behind months and dates.

/// Latest second believed (year 5138). Twelve digits and more are milliseconds, which would put every row in one split.
pub const LATEST: i64 = 99_999_999_999;

/// What [`seconds`] accepts, for messages.
pub const EXPECTED: &str =
    "expected Unix seconds (not milliseconds), or a UTC date like 2001-05-31 or 2001-05-31T20:15:00Z";

/// Unix seconds from an integer, a float (rounded down), or an ISO date with an optional time (UTC).
pub fn seconds(text: &str) -> Option<i64> {
    if let Ok(t) = text.parse::<f64>() {
        // Up to LATEST every integer is exact as a float.
        return (t.is_finite() && t.abs() <= LATEST as f64).then_some(t.floor() as i64);
    }
    let text = text.strip_suffix('Z').unwrap_or(text);
    let (date, time) = text.split_once(['T', ' ']).unwrap_or((text, "00:00:00"));
    let [year, month, day] = numbers(date, '-')?[..] else { return None };
    let (hour, minute, second) = match numbers(time.split_once('.').map_or(time, |t| t.0), ':')?[..] {
        [h, m] => (h, m, 0),
        [h, m, s] => (h, m, s),
        _ => return None,
    };
    let days = days_from_civil(year, month, day);
    let valid =
        (1..=12).contains(&month) && hour < 24 && minute < 60 && second < 60 && civil(days) == (year, month, day);
    valid.then_some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

fn numbers(text: &str, separator: char) -> Option<Vec<i64>> {
    let number = |p: &str| {
        let digits = (1..=4).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| p.parse().ok()).flatten()
    };
    text.split(separator).map(number).collect()
}

/// (year, month) of Unix seconds.
pub fn year_and_month(seconds: i64) -> (i64, i64) {
    let (year, month, _) = civil(seconds.div_euclid(86_400));
    (year, month)
}

/// A date of Unix seconds, as text.
pub fn date(seconds: i64) -> String {
    let (year, month, day) = civil(seconds.div_euclid(86_400));
    format!("{year:04}-{month:02}-{day:02}")
}

// Years begin in March below, so that the leap day comes last; 400 years have 146,097 days, and 719,468 days lie between
// 0000-03-01 and 1970-01-01.

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468
}

fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_numbers() {
        assert_eq!(seconds("2001-06-01"), Some(991_353_600));
        assert_eq!(seconds("2001-06-01T01:02:03Z"), Some(991_353_600 + 3723));
        assert_eq!(seconds("2001-06-01 01:02:03.999"), Some(991_353_600 + 3723));
        assert_eq!(seconds("978300760"), Some(978_300_760));
        assert_eq!(seconds("881250949.0"), Some(881_250_949));
        assert_eq!(seconds("8.81250949e8"), Some(881_250_949));
        assert_eq!(seconds("-1.5"), Some(-2));
    }

    #[test]
    fn what_is_no_time() {
        for text in [
            "yesterday",
            "",
            "2001-13-01",
            "2001-02-29",
            "2001-00-10",
            "2001-05",
            "2001-05-31T24:00:00",
            "2001-05-31T10",
            "2001-05-31T10:00:00+02:00",
            "+2001-05-31",
            "1500000000000",
            "NaN",
            "inf",
            "10:00",
        ] {
            assert_eq!(seconds(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_calendar_counts_every_day_once() {
        assert_eq!(days_from_civil(1970, 1, 1), 0);
        let mut last = civil(-800_000);
        for days in -799_999..800_000 {
            let (year, month, day) = civil(days);
            assert_eq!(days_from_civil(year, month, day), days);
            let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
            let length = [31, 28 + i64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            let next = match last {
                (y, 12, 31) => (y + 1, 1, 1),
                (y, m, d) if d < length[m as usize - 1] || (m == 2 && d == 28 && (year, month, day) == (y, 2, 29)) => {
                    (y, m, d + 1)
                }
                (y, m, _) => (y, m + 1, 1),
            };
            assert_eq!((year, month, day), next);
            last = next;
        }
        assert_eq!(year_and_month(991_353_599), (2001, 5));
        assert_eq!(year_and_month(991_353_600), (2001, 6));
        assert_eq!(date(991_353_599), "2001-05-31");
    }
}
