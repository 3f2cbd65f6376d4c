//! Columns of any scalar Arrow type read cell by cell as text, so that Parquet goes through the same checks as delimited text.
//!
//! Numbers appear in their shortest form, booleans as 0 and 1, dates and times as Unix seconds (whole ones, UTC; a time without
//! a zone is taken as UTC), nulls as the empty text.

use std::fmt::Write as _;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Date32Type, Date64Type, Decimal32Type, Decimal64Type, Decimal128Type, Decimal256Type,
    DecimalType, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, TimestampMicrosecondType,
    TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type, UInt32Type,
    UInt64Type,
};
use arrow_array::{Array, ArrayRef};
use arrow_schema::{DataType, TimeUnit};

/// Appends the text of cell `i` to the string.
pub type Cells<'a> = Box<dyn Fn(usize, &mut String) + 'a>;

/// Cells of a column. `Err`: what it is instead, to follow its name.
pub fn cells(array: &ArrayRef) -> Result<Cells<'_>, String> {
    let read = typed(array)?;
    if array.null_count() == 0 {
        return Ok(read);
    }
    Ok(Box::new(move |i, out| {
        if array.is_valid(i) {
            read(i, out);
        }
    }))
}

fn typed(array: &ArrayRef) -> Result<Cells<'_>, String> {
    if let Some(dictionary) = array.as_any_dictionary_opt() {
        let values = cells(dictionary.values())?;
        if dictionary.values().is_empty() {
            return Ok(Box::new(|_, _| {}));
        }
        let keys = dictionary.normalized_keys();
        return Ok(Box::new(move |i, out| values(keys[i], out)));
    }
    Ok(match array.data_type() {
        DataType::Utf8 => text(array.as_string::<i32>(), |a, i| a.value(i)),
        DataType::LargeUtf8 => text(array.as_string::<i64>(), |a, i| a.value(i)),
        DataType::Utf8View => text(array.as_string_view(), |a, i| a.value(i)),
        DataType::Binary => {
            bytes(array, array.as_binary::<i32>().iter().flatten(), |a, i| a.as_binary::<i32>().value(i))?
        }
        DataType::LargeBinary => {
            bytes(array, array.as_binary::<i64>().iter().flatten(), |a, i| a.as_binary::<i64>().value(i))?
        }
        DataType::Boolean => Box::new(|i, out| out.push(if array.as_boolean().value(i) { '1' } else { '0' })),
        DataType::Int8 => number::<Int8Type>(array),
        DataType::Int16 => number::<Int16Type>(array),
        DataType::Int32 => number::<Int32Type>(array),
        DataType::Int64 => number::<Int64Type>(array),
        DataType::UInt8 => number::<UInt8Type>(array),
        DataType::UInt16 => number::<UInt16Type>(array),
        DataType::UInt32 => number::<UInt32Type>(array),
        DataType::UInt64 => number::<UInt64Type>(array),
        DataType::Float32 => number::<Float32Type>(array),
        DataType::Float64 => number::<Float64Type>(array),
        DataType::Decimal32(..) => decimal::<Decimal32Type>(array),
        DataType::Decimal64(..) => decimal::<Decimal64Type>(array),
        DataType::Decimal128(..) => decimal::<Decimal128Type>(array),
        DataType::Decimal256(..) => decimal::<Decimal256Type>(array),
        DataType::Date32 => {
            let days = array.as_primitive::<Date32Type>();
            Box::new(|i, out| print(out, i64::from(days.value(i)) * 86_400))
        }
        DataType::Date64 => seconds::<Date64Type>(array, 1_000),
        DataType::Timestamp(TimeUnit::Second, _) => seconds::<TimestampSecondType>(array, 1),
        DataType::Timestamp(TimeUnit::Millisecond, _) => seconds::<TimestampMillisecondType>(array, 1_000),
        DataType::Timestamp(TimeUnit::Microsecond, _) => seconds::<TimestampMicrosecondType>(array, 1_000_000),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => seconds::<TimestampNanosecondType>(array, 1_000_000_000),
        other => return Err(format!("is of type {other}; expected text, numbers, or times")),
    })
}

fn print(out: &mut String, value: impl std::fmt::Display) {
    // Writing into a String cannot fail.
    let _ = write!(out, "{value}");
}

fn text<'a, A>(array: &'a A, value: fn(&'a A, usize) -> &'a str) -> Cells<'a> {
    Box::new(move |i, out| out.push_str(value(array, i)))
}

/// Text that an old writer (Hive, Impala, Spark's binaryAsString) marked as bytes.
fn bytes<'a>(
    array: &'a ArrayRef,
    mut values: impl Iterator<Item = &'a [u8]>,
    value: fn(&'a ArrayRef, usize) -> &'a [u8],
) -> Result<Cells<'a>, String> {
    if !values.all(|v| std::str::from_utf8(v).is_ok()) {
        return Err("holds bytes that are not UTF-8; expected text".into());
    }
    Ok(Box::new(move |i, out| out.push_str(std::str::from_utf8(value(array, i)).unwrap_or_default())))
}

fn number<T: ArrowPrimitiveType<Native: std::fmt::Display>>(array: &ArrayRef) -> Cells<'_> {
    let array = array.as_primitive::<T>();
    Box::new(|i, out| print(out, array.value(i)))
}

fn decimal<T: DecimalType>(array: &ArrayRef) -> Cells<'_> {
    let array = array.as_primitive::<T>();
    Box::new(|i, out| out.push_str(&array.value_as_string(i)))
}

fn seconds<T: ArrowPrimitiveType<Native = i64>>(array: &ArrayRef, per_second: i64) -> Cells<'_> {
    let array = array.as_primitive::<T>();
    Box::new(move |i, out| print(out, array.value(i).div_euclid(per_second)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::*;

    use super::*;

    fn all(array: impl Array + 'static) -> Vec<String> {
        let array: ArrayRef = Arc::new(array);
        let cells = cells(&array).unwrap();
        let cell = |i| {
            let mut text = String::new();
            cells(i, &mut text);
            text
        };
        (0..array.len()).map(cell).collect()
    }

    #[test]
    fn every_scalar_has_a_text() {
        assert_eq!(all(StringArray::from(vec![Some("é"), None])), ["é", ""]);
        assert_eq!(all(LargeStringArray::from(vec!["a"])), ["a"]);
        assert_eq!(
            all(StringViewArray::from(vec!["a", "longer than twelve bytes"])),
            ["a", "longer than twelve bytes"]
        );
        assert_eq!(all(BinaryArray::from(vec![Some(&b"xy"[..]), None])), ["xy", ""]);
        assert_eq!(all(BooleanArray::from(vec![Some(true), Some(false), None])), ["1", "0", ""]);
        assert_eq!(all(Int8Array::from(vec![-3])), ["-3"]);
        assert_eq!(all(UInt64Array::from(vec![u64::MAX])), ["18446744073709551615"]);
        assert_eq!(all(Float64Array::from(vec![12.0, 4.5])), ["12", "4.5"]);
        assert_eq!(all(Float32Array::from(vec![0.1])), ["0.1"]);
        let decimals = Decimal128Array::from(vec![450, -5]).with_precision_and_scale(9, 2).unwrap();
        assert_eq!(all(decimals), ["4.50", "-0.05"]);
        assert_eq!(all(Date32Array::from(vec![1, -1])), ["86400", "-86400"]);
        assert_eq!(all(TimestampMillisecondArray::from(vec![1999, -1])), ["1", "-1"]);
        assert_eq!(all(TimestampNanosecondArray::from(vec![1_500_000_000]).with_timezone("UTC")), ["1"]);
        let words: DictionaryArray<types::Int32Type> = [Some("a"), None, Some("b"), Some("a")].into_iter().collect();
        assert_eq!(all(words), ["a", "", "b", "a"]);
        let none: DictionaryArray<types::Int32Type> = [None::<&str>, None].into_iter().collect();
        assert_eq!(all(none), ["", ""]);
    }

    #[test]
    fn other_types_are_named() {
        let list: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>([Some([Some(1)])]));
        assert!(cells(&list).err().unwrap().starts_with("is of type List("));
        let latin1: ArrayRef = Arc::new(BinaryArray::from(vec![&b"caf\xe9"[..]]));
        assert_eq!(cells(&latin1).err().unwrap(), "holds bytes that are not UTF-8; expected text");
    }
}
