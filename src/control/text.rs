//! What people read: sizes, ages, aligned tables, colours.
//!
//! Owns: the look of the command line's and the web page's values.
//! Does not own: exact sizes that are read back ([`super::size`]).

use crate::clock::UnixMillis;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

/// `1.5 GiB`: at most one digit after the point, binary units.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = usize::try_from(bytes.ilog2() / 10).unwrap_or(1).min(UNITS.len());
    let unit = 1u128 << (10 * power);
    let tenths = (u128::from(bytes) * 10 + unit / 2) / unit;
    // 1023.96 KiB rounds to the next unit.
    if tenths >= 10240 && power < UNITS.len() {
        return format!("1 {}", UNITS[power]);
    }
    match tenths % 10 {
        0 => format!("{} {}", tenths / 10, UNITS[power - 1]),
        tenth => format!("{}.{tenth} {}", tenths / 10, UNITS[power - 1]),
    }
}

/// `3 min`: one unit, rounded down.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// `3 min ago`
pub fn age(then: UnixMillis, now: UnixMillis) -> String {
    let since = now.since(then);
    if since < Duration::from_secs(1) { "just now".to_owned() } else { format!("{} ago", duration(since)) }
}

/// `2026-04-14 09:30:00` in UTC, for logs and tool tips.
pub fn utc(time: UnixMillis) -> String {
    let seconds = time.0 / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days, counted in eras of 400 years that begin on 1 March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

/// Replaces what could drive a terminal: names and messages come from a pool that others write.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// How a cell of a table is aligned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Align {
    Left,
    Right,
}

/// Rows under a header, columns as wide as their widest cell.
pub fn table(header: &[(&str, Align)], rows: &[Vec<String>], paint: Paint) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| plain(cell).replace('\n', " ")).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].0.chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let mut line = String::new();
        for (column, cell) in cells.iter().enumerate().take(header.len()) {
            if column > 0 {
                line.push_str("  ");
            }
            let padding = widths[column].saturating_sub(cell.chars().count());
            match header[column].1 {
                Align::Left => line.push_str(&format!("{cell}{}", " ".repeat(padding))),
                Align::Right => line.push_str(&format!("{}{cell}", " ".repeat(padding))),
            }
        }
        line.trim_end().to_owned()
    };
    let titles: Vec<String> = header.iter().map(|(title, _)| (*title).to_owned()).collect();
    let mut text = format!("{}\n", paint.bold(&line(&titles)));
    for row in &rows {
        text.push_str(&line(row));
        text.push('\n');
    }
    text
}

/// `NAME  value` lines, aligned; for one thing shown in full.
pub fn fields(fields: &[(&str, String)], paint: Paint) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in fields {
        let padding = " ".repeat(width - name.len());
        // Writing to a String cannot fail.
        writeln!(text, "{}{padding}  {}", paint.bold(name), plain(value)).ok();
    }
    text
}

/// Whether to use colours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paint {
    Colour,
    Plain,
}

impl Paint {
    /// Colours only on a terminal, and where `NO_COLOR` is not set to anything.
    pub fn of(stream: &impl IsTerminal) -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if stream.is_terminal() && !refused { Self::Colour } else { Self::Plain }
    }

    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    pub fn red(self, text: &str) -> String {
        self.wrap("1;31", text)
    }

    pub fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    pub fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub fn cyan(self, text: &str) -> String {
        self.wrap("36", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        match self {
            Self::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
            Self::Plain => text.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_have_at_most_one_digit_after_the_point() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1 KiB");
        assert_eq!(size(40 << 30), "40 GiB");
        assert_eq!(size(3 << 39), "1.5 TiB");
        assert_eq!(size((1 << 20) - 1), "1 MiB");
        assert_eq!(size(u64::MAX), "16 EiB");
    }

    #[test]
    fn ages_have_one_unit() {
        let ago = |seconds: u64| age(UnixMillis(0), UnixMillis(seconds * 1000));
        assert_eq!(ago(0), "just now");
        assert_eq!(ago(59), "59 s ago");
        assert_eq!(ago(200), "3 min ago");
        assert_eq!(ago(7200), "2 h ago");
        assert_eq!(ago(86_400 * 3), "3 days ago");
    }

    #[test]
    fn dates_are_civil() {
        assert_eq!(utc(UnixMillis(0)), "1970-01-01 00:00:00");
        assert_eq!(utc(UnixMillis(951_782_400_000)), "2000-02-29 00:00:00");
        assert_eq!(utc(UnixMillis(1_800_000_000_000)), "2027-01-15 08:00:00");
    }

    #[test]
    fn tables_align_and_show_no_control_characters() {
        let header = [("NAME", Align::Left), ("SIZE", Align::Right)];
        let rows =
            vec![vec!["a".to_owned(), "1".to_owned()], vec!["\x1b[2Jlonger".to_owned(), "100".to_owned()]];
        assert_eq!(
            table(&header, &rows, Paint::Plain),
            "NAME        SIZE\na              1\n\u{fffd}[2Jlonger   100\n"
        );
    }

    proptest! {
        #[test]
        fn any_number_and_time_can_be_shown(bytes: u64, millis: u64) {
            prop_assert!(size(bytes).len() <= 10);
            prop_assert!(utc(UnixMillis(millis)).len() >= 19);
        }
    }
}
