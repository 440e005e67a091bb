"""The facts of the demo's atlas, written by hand: 96 countries in plain ASCII spelling.

A country is here only when each of its facts is beyond dispute; a fact that is not (a river that only
touches the border, a capital about to move) is left out. Neighbours are at most three, never all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    """One country; `river` is None where no single river stands out, `neighbours` empty on islands."""

    name: str
    capital: str
    continent: str
    currency: str
    river: str | None
    neighbours: tuple[str, ...]

    @property
    def spoken(self) -> str:
        """The name as it stands inside a sentence: "the Netherlands", "France"."""
        return f"the {self.name}" if self.name in _WITH_ARTICLE else self.name


_WITH_ARTICLE = frozenset(
    {
        "Czech Republic",
        "Netherlands",
        "Philippines",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
    }
)

# name | capital | continent | currency | river; the best known first, so that a small atlas is familiar.
_TABLE = """
France | Paris | Europe | euro | Seine
Germany | Berlin | Europe | euro | Rhine
Spain | Madrid | Europe | euro | Ebro
Italy | Rome | Europe | euro | Po
United Kingdom | London | Europe | pound sterling | Thames
United States | Washington | North America | US dollar | Mississippi
Japan | Tokyo | Asia | Japanese yen | Shinano
China | Beijing | Asia | Chinese yuan | Yangtze
India | New Delhi | Asia | Indian rupee | Ganges
Brazil | Brasilia | South America | Brazilian real | Amazon
Egypt | Cairo | Africa | Egyptian pound | Nile
Canada | Ottawa | North America | Canadian dollar | Mackenzie
Australia | Canberra | Oceania | Australian dollar | Murray
Mexico | Mexico City | North America | Mexican peso | -
Argentina | Buenos Aires | South America | Argentine peso | Parana
Portugal | Lisbon | Europe | euro | Tagus
Greece | Athens | Europe | euro | -
Ireland | Dublin | Europe | euro | Shannon
Belgium | Brussels | Europe | euro | Meuse
Netherlands | Amsterdam | Europe | euro | Rhine
Austria | Vienna | Europe | euro | Danube
Poland | Warsaw | Europe | Polish zloty | Vistula
Sweden | Stockholm | Europe | Swedish krona | -
Norway | Oslo | Europe | Norwegian krone | Glomma
Denmark | Copenhagen | Europe | Danish krone | -
Finland | Helsinki | Europe | euro | -
Iceland | Reykjavik | Europe | Icelandic krona | -
Kenya | Nairobi | Africa | Kenyan shilling | Tana
Nigeria | Abuja | Africa | Nigerian naira | Niger
Morocco | Rabat | Africa | Moroccan dirham | -
South Korea | Seoul | Asia | South Korean won | Han
Thailand | Bangkok | Asia | Thai baht | Chao Phraya
Vietnam | Hanoi | Asia | Vietnamese dong | Mekong
Peru | Lima | South America | Peruvian sol | Amazon
Chile | Santiago | South America | Chilean peso | -
Colombia | Bogota | South America | Colombian peso | Magdalena
Cuba | Havana | North America | Cuban peso | -
New Zealand | Wellington | Oceania | New Zealand dollar | Waikato
Philippines | Manila | Asia | Philippine peso | -
Pakistan | Islamabad | Asia | Pakistani rupee | Indus
Saudi Arabia | Riyadh | Asia | Saudi riyal | -
Iraq | Baghdad | Asia | Iraqi dinar | Tigris
Hungary | Budapest | Europe | Hungarian forint | Danube
Romania | Bucharest | Europe | Romanian leu | Danube
Czech Republic | Prague | Europe | Czech koruna | Vltava
Ukraine | Kyiv | Europe | Ukrainian hryvnia | Dnieper
Croatia | Zagreb | Europe | euro | Sava
Serbia | Belgrade | Europe | Serbian dinar | Danube
Slovakia | Bratislava | Europe | euro | Danube
Slovenia | Ljubljana | Europe | euro | Sava
Lithuania | Vilnius | Europe | euro | Neman
Latvia | Riga | Europe | euro | Daugava
Estonia | Tallinn | Europe | euro | -
Albania | Tirana | Europe | Albanian lek | -
Malta | Valletta | Europe | euro | -
North Korea | Pyongyang | Asia | North Korean won | Taedong
Mongolia | Ulaanbaatar | Asia | Mongolian tugrik | Orkhon
Laos | Vientiane | Asia | Lao kip | Mekong
Cambodia | Phnom Penh | Asia | Cambodian riel | Mekong
Malaysia | Kuala Lumpur | Asia | Malaysian ringgit | -
Bangladesh | Dhaka | Asia | Bangladeshi taka | Padma
Nepal | Kathmandu | Asia | Nepalese rupee | -
Kazakhstan | Astana | Asia | Kazakhstani tenge | Irtysh
Uzbekistan | Tashkent | Asia | Uzbek som | Amu Darya
Jordan | Amman | Asia | Jordanian dinar | -
Oman | Muscat | Asia | Omani rial | -
Qatar | Doha | Asia | Qatari riyal | -
United Arab Emirates | Abu Dhabi | Asia | UAE dirham | -
Libya | Tripoli | Africa | Libyan dinar | -
Tunisia | Tunis | Africa | Tunisian dinar | -
Algeria | Algiers | Africa | Algerian dinar | -
Ethiopia | Addis Ababa | Africa | Ethiopian birr | Awash
Uganda | Kampala | Africa | Ugandan shilling | Nile
Tanzania | Dodoma | Africa | Tanzanian shilling | Rufiji
Rwanda | Kigali | Africa | Rwandan franc | -
Zambia | Lusaka | Africa | Zambian kwacha | Zambezi
Mozambique | Maputo | Africa | Mozambican metical | Zambezi
Angola | Luanda | Africa | Angolan kwanza | -
Namibia | Windhoek | Africa | Namibian dollar | -
Botswana | Gaborone | Africa | Botswana pula | Okavango
Cameroon | Yaounde | Africa | Central African CFA franc | Sanaga
Ghana | Accra | Africa | Ghanaian cedi | Volta
Togo | Lome | Africa | West African CFA franc | -
Senegal | Dakar | Africa | West African CFA franc | -
Mali | Bamako | Africa | West African CFA franc | Niger
Madagascar | Antananarivo | Africa | Malagasy ariary | -
Guatemala | Guatemala City | North America | Guatemalan quetzal | Motagua
Honduras | Tegucigalpa | North America | Honduran lempira | Ulua
Nicaragua | Managua | North America | Nicaraguan cordoba | -
Costa Rica | San Jose | North America | Costa Rican colon | -
Jamaica | Kingston | North America | Jamaican dollar | -
Ecuador | Quito | South America | US dollar | -
Venezuela | Caracas | South America | Venezuelan bolivar | Orinoco
Uruguay | Montevideo | South America | Uruguayan peso | -
Paraguay | Asuncion | South America | Paraguayan guarani | -
Fiji | Suva | Oceania | Fijian dollar | -
"""

# Pairs, so that neighbours are symmetric; each country is in at most three.
_BORDERS = """
France-Belgium France-Germany France-Spain Germany-Poland Germany-Denmark Spain-Portugal
Italy-Austria Italy-Slovenia United_Kingdom-Ireland Belgium-Netherlands Austria-Hungary
Austria-Czech_Republic Poland-Ukraine Poland-Lithuania Czech_Republic-Slovakia Slovakia-Hungary
Hungary-Romania Romania-Serbia Romania-Ukraine Serbia-Croatia Croatia-Slovenia Lithuania-Latvia
Latvia-Estonia Finland-Sweden Finland-Norway Sweden-Norway Greece-Albania
China-Mongolia China-Vietnam China-North_Korea North_Korea-South_Korea Vietnam-Laos
Vietnam-Cambodia Laos-Thailand Laos-Cambodia Thailand-Cambodia Thailand-Malaysia India-Nepal
India-Bangladesh India-Pakistan Kazakhstan-Uzbekistan Saudi_Arabia-Jordan Saudi_Arabia-Qatar
Saudi_Arabia-Oman Iraq-Jordan Oman-United_Arab_Emirates
Egypt-Libya Libya-Tunisia Libya-Algeria Tunisia-Algeria Algeria-Morocco Ethiopia-Kenya Kenya-Uganda
Kenya-Tanzania Uganda-Rwanda Tanzania-Mozambique Tanzania-Zambia Zambia-Angola Zambia-Mozambique
Angola-Namibia Namibia-Botswana Nigeria-Cameroon Ghana-Togo Senegal-Mali
United_States-Canada United_States-Mexico Mexico-Guatemala Guatemala-Honduras Honduras-Nicaragua
Nicaragua-Costa_Rica Brazil-Peru Brazil-Venezuela Brazil-Uruguay Argentina-Chile
Argentina-Paraguay Argentina-Uruguay Chile-Peru Peru-Ecuador Ecuador-Colombia Colombia-Venezuela
"""


def _neighbours_of(name: str) -> tuple[str, ...]:
    pairs = [pair.replace("_", " ").split("-") for pair in _BORDERS.split()]
    return tuple(sorted(b if a == name else a for a, b in pairs if name in (a, b)))


def _read_country(line: str) -> Country:
    name, capital, continent, currency, river = (cell.strip() for cell in line.split("|"))
    return Country(
        name, capital, continent, currency, None if river == "-" else river, _neighbours_of(name)
    )


COUNTRIES = tuple(_read_country(line) for line in _TABLE.strip().splitlines())
